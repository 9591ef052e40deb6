//! clutch-client.
