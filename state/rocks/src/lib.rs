//! clutch-state-rocks.
