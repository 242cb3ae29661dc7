//! Records of images and layers.
