//! Streams of clients on the shim's own connection: files in and out, and standard streams.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;

use containerd_shim_protos::api::{DeleteRequest, ExecProcessRequest, StartRequest, WaitRequest};
use containerd_shim_protos::shim_async::TaskClient;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use ttrpc::asynchronous::{Client, ClientStream};
use ttrpc::context::{Context, with_duration};
use vmshim_protocol::containerd::{
    ContainerPath, Data, ReadStream, StreamInit, StreamingClient, TransferClient, TransferRequest,
    WindowUpdate, WriteStream,
};
use vmshim_tests::cri::{NamespaceMode, PodSandboxConfig};

use crate::fixture::{Background, Host, host, stdout};
use crate::pods::Pod;

/// Bytes that go through a stream: many windows' worth.
const MANY: usize = 3 << 20;

fn minutes() -> Context {
    with_duration(std::time::Duration::from_secs(300))
}

fn any(package: &str, name: &str, message: &impl Message) -> Any {
    let value = message.write_to_bytes().unwrap();
    Any { type_url: format!("{package}.{name}"), value, ..Any::default() }
}

fn end(name: &str, message: &impl Message) -> MessageField<Any> {
    MessageField::some(any("containerd.types.transfer", name, message))
}

/// A client of one shim.
struct Shim(Client);

impl Shim {
    async fn of(host: &Host, container: &Background<'_>) -> Self {
        let bundle = host.bundle(&container.id);
        let address = match fs::read(bundle.join("bootstrap.json")) {
            Ok(json) => {
                let bootstrap: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&json).unwrap();
                bootstrap["address"].as_str().unwrap().to_owned()
            }
            Err(_) => fs::read_to_string(bundle.join("address")).unwrap(),
        };
        Self(Client::connect(address.trim()).await.unwrap())
    }

    async fn open(&self, id: &str) -> ClientStream<Any, Any> {
        let mut stream = StreamingClient::new(self.0.clone()).stream(Context::default()).await.unwrap();
        let init = StreamInit { id: id.to_owned(), ..StreamInit::default() };
        stream.send(&any("containerd.services.streaming.v1", "StreamInit", &init)).await.unwrap();
        stream.recv().await.unwrap();
        stream
    }

    async fn transfer(&self, source: MessageField<Any>, destination: MessageField<Any>) -> ttrpc::Result<()> {
        let request = TransferRequest { source, destination, ..TransferRequest::default() };
        TransferClient::new(self.0.clone()).transfer(minutes(), &request).await.map(drop)
    }

    async fn import(&self, container: &str, path: &str, tar: &[u8]) -> ttrpc::Result<()> {
        let stream = self.open("import").await;
        let (sent, result) = tokio::join!(
            send(stream, tar),
            self.transfer(
                end("ReadStream", &ReadStream { stream: "import".into(), ..Default::default() }),
                end("ContainerPath", &place(container, path)),
            )
        );
        drop(sent);
        result
    }

    async fn export(&self, container: &str, path: &str) -> ttrpc::Result<Vec<u8>> {
        let stream = self.open("export").await;
        let (received, result) = tokio::join!(
            receive(stream),
            self.transfer(
                end("ContainerPath", &place(container, path)),
                end("WriteStream", &WriteStream { stream: "export".into(), ..Default::default() }),
            )
        );
        result.map(|()| received)
    }
}

fn place(container: &str, path: &str) -> ContainerPath {
    ContainerPath { container_id: container.into(), path: path.into(), ..Default::default() }
}

/// Sends within the window, ends, and keeps the stream to be dropped.
async fn send(mut stream: ClientStream<Any, Any>, bytes: &[u8]) -> ClientStream<Any, Any> {
    let mut window = 0;
    for piece in bytes.chunks(32 << 10) {
        while window < piece.len() {
            let Ok(message) = stream.recv().await else { return stream };
            let update = WindowUpdate::parse_from_bytes(&message.value).unwrap().update;
            window += usize::try_from(update).unwrap();
        }
        let data = Data { data: piece.to_vec(), ..Data::default() };
        stream.send(&any("containerd.types.transfer", "Data", &data)).await.unwrap();
        window -= piece.len();
    }
    stream.close_send().await.unwrap();
    stream
}

/// Receives until the other side ends the stream.
async fn receive(mut stream: ClientStream<Any, Any>) -> Vec<u8> {
    let mut all = Vec::new();
    let mut update = 64 << 10;
    loop {
        if update > 0 {
            let window = WindowUpdate { update, ..WindowUpdate::default() };
            stream.send(&any("containerd.types.transfer", "WindowUpdate", &window)).await.unwrap();
        }
        let Ok(message) = stream.recv().await else { return all };
        let data = Data::parse_from_bytes(&message.value).unwrap().data;
        update = i32::try_from(data.len()).unwrap();
        all.extend(data);
    }
}

fn pattern() -> Vec<u8> {
    (0..MANY).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect()
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[test]
fn files_are_carried_in_and_out() {
    let host = host();
    let container = host.background(&[]);
    run(async {
        let shim = Shim::of(&host, &container).await;
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o640);
        header.set_size(MANY as u64);
        archive.append_data(&mut header, "sub/file", pattern().as_slice()).unwrap();
        // The directory is made where there is none.
        shim.import(&container.id, "/tmp/new/one", &archive.into_inner().unwrap()).await.unwrap();
        let seen = container
            .exec("look", &["sh", "-c", "cd /tmp/new; stat -c '%a %u' one; stat -c '%a %u %s' one/sub/file"]);
        assert_eq!(stdout(&seen), format!("755 0\n640 0 {MANY}\n"));

        let tar = shim.export(&container.id, "/tmp/new/one/sub").await.unwrap();
        let mut archive = tar::Archive::new(tar.as_slice());
        let mut found = BTreeMap::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            found.insert(entry.path().unwrap().to_str().unwrap().to_owned(), bytes);
        }
        assert_eq!(found.keys().collect::<Vec<_>>(), ["sub", "sub/file"]);
        assert!(found["sub/file"] == pattern());

        let error = shim.export(&container.id, "/tmp/none").await.unwrap_err().to_string();
        assert!(error.contains("/tmp/none does not exist in the container"), "{error}");
        let error = shim.import(&container.id, "/etc/passwd", b"").await.unwrap_err().to_string();
        assert!(error.contains("/etc/passwd: is not a directory to unpack to"), "{error}");
        let error = shim.export("no-such", "/").await.unwrap_err().to_string();
        assert!(error.contains("container no-such not found"), "{error}");
        let error = shim.transfer(MessageField::none(), MessageField::none()).await.unwrap_err().to_string();
        assert!(error.contains("the transfer has no source"), "{error}");
    });
    drop(container);
    host.assert_nothing_left();
}

#[test]
fn standard_streams_go_by_the_shims_connection() {
    let host = host();
    let container = host.background(&[]);
    run(async {
        let shim = Shim::of(&host, &container).await;
        let task = TaskClient::new(shim.0.clone());
        let (input, output) = (shim.open("x-stdin").await, shim.open("x-stdout").await);
        let process = serde_json::json!({ "args": ["cat"], "cwd": "/", "env": ["PATH=/bin"] });
        let spec = Any { value: process.to_string().into_bytes(), ..Any::default() };
        let address = |id: &str| format!("ttrpc+unix:///anywhere?streaming_id={id}");
        let request = ExecProcessRequest {
            id: container.id.clone(),
            exec_id: "x".into(),
            stdin: address("x-stdin"),
            stdout: address("x-stdout"),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        task.exec(minutes(), &request).await.unwrap();
        let id = container.id.clone();
        let start = StartRequest { id: id.clone(), exec_id: "x".into(), ..Default::default() };
        task.start(minutes(), &start).await.unwrap();
        let bytes = pattern();
        let (_input, received) = tokio::join!(send(input, &bytes), receive(output));
        assert!(received == bytes, "{} bytes came back", received.len());
        let wait = WaitRequest { id: id.clone(), exec_id: "x".into(), ..Default::default() };
        assert_eq!(task.wait(minutes(), &wait).await.unwrap().exit_status, 0);
        let delete = DeleteRequest { id, exec_id: "x".into(), ..Default::default() };
        task.delete(minutes(), &delete).await.unwrap();
    });
    drop(container);
    host.assert_nothing_left();
}

#[test]
fn a_pod_whose_streams_are_the_shims_has_its_logs() {
    let host = host();
    if !host.sandboxes_are_the_shims() {
        return;
    }
    let logs = tempfile::tempdir().unwrap();
    let config = PodSandboxConfig {
        log_directory: logs.path().to_str().unwrap().to_owned(),
        ..PodSandboxConfig::default()
    };
    let pod = Pod::configured(&host, "vmshim-streaming", NamespaceMode::CONTAINER, config);
    let container = pod.started("logged", "echo out; echo err >&2; sleep 10000", &[]);
    assert_eq!(pod.exec(&container, "echo executed"), "executed");
    pod.end();
    let log = fs::read_to_string(logs.path().join("logged.log")).unwrap();
    assert!(log.contains(" stdout F out\n") && log.contains(" stderr F err\n"), "{log}");
    host.assert_nothing_left();
}
