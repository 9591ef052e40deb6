//! Generates the service that carries sessions; its messages are those of `clutch-proto`.

fn main() {
    let file = "clutch/session/v1/session.proto";
    println!("cargo:rerun-if-changed=../proto/clutch");
    let descriptors =
        protox::compile([file], ["../proto"]).unwrap_or_else(|e| panic!("compile {file}: {e:?}"));
    tonic_prost_build::configure()
        .build_transport(true)
        .extern_path(".clutch", "::clutch_proto::clutch")
        .extern_path(".clutch.session.v1.Frame", "::clutch_proto::parts::Frame")
        .extern_path(".clutch.session.v1.Frames", "::clutch_proto::parts::Frames")
        .compile_fds(descriptors)
        .expect("generate code");
}
