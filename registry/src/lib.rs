//! clutch-registry.
