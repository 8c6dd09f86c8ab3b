"""Records, pairing and batching; the project's own tfds builders."""

import os

# Read by OpenCV when it is first imported. An image of more pixels (2**27 of them take 400 MB) is
# refused before anything is decoded: a small file can claim to be a huge one.
os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', str(2**27))
# What cannot be decoded is reported by this program, with the record's name.
os.environ.setdefault('OPENCV_LOG_LEVEL', 'SILENT')
