//! clutch-cdc.
