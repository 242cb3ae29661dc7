//! Records of pods and containers.
