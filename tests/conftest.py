import torch

torch.set_num_threads(1)  # miniatures are too small to share, and on a busy machine two threads mostly wait for each other
