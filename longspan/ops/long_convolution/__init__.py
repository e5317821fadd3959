"""Long convolutions on one device: by the Fourier transform, or as the recurrence that a sum of exponentials is."""
