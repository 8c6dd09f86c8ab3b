"""Records, caches, pairing and batching; the project's own tfds builders."""

import os

# OpenCV reads this when it is imported. It refuses images with more pixels (2**27 take 400 MB)
# before decoding anything: a small file can claim to be a huge image.
os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', str(2**27))
# This package reports images that cannot be decoded itself, with the record's name.
os.environ.setdefault('OPENCV_LOG_LEVEL', 'SILENT')
