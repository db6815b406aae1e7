"""Image bytes to pixels, random crops, thumbnails for display."""
