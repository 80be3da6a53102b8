"""What train.py, sft.py and eval.py stand on beside the method: settings, run folders, errors, torchrun."""
