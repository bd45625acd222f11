import os

# One thread, here and in all processes that tests start: miniatures are too small to share, and on a busy machine two threads
# mostly wait for each other. torch reads this when it is imported, which is later.
os.environ.setdefault("OMP_NUM_THREADS", "1")
