"""What stands above the method: settings, run folders, finding models, their memory, errors in
words."""
