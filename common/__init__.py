"""What every layer needs: files, options, schedule, early stopping, device, checkpoints, progress, Modal."""
