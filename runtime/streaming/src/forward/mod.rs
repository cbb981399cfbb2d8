//! Port-forward: connections into a pod.

mod channels;
mod pairs;
mod relay;

pub(crate) use self::{
    channels::{check_ports, data_channels, over_channels},
    pairs::over_spdy,
};
