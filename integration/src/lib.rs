//! clutch-integration.
