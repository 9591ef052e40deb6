//! clutch-log-local.
