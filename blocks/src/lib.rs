//! clutch-blocks.
