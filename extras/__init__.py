"""What is not the method: the pocket model, a baseline, measurements, figures. See README.md in this folder."""
