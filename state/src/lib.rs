//! clutch-state.
