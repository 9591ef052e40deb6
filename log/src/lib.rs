//! clutch-log.
