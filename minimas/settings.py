from .styles import Settings
