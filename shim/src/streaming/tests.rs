//! A client, by the same protocol as containerd's, against the service.

use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixListener;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use ttrpc::asynchronous::{Client, ClientStream, Server};
use ttrpc::context::Context;
use vmshim_protocol::containerd::{Data, StreamingClient, WindowUpdate};

use super::*;
use crate::stdio::Streams;

struct Host {
    waiting: Arc<Waiting>,
    address: String,
    _directory: tempfile::TempDir,
    _server: Server,
}

impl Host {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let waiting = Arc::new(Waiting::default());
        let listener = UnixListener::bind(&path).unwrap();
        // SAFETY: the descriptor is a listening Unix socket that is owned here and given away whole.
        let server = unsafe { Server::new().add_unix_listener(listener.into_raw_fd()) }.unwrap();
        let mut server = server.register_service(services(&waiting));
        server.start().await.unwrap();
        let address = format!("unix://{}", path.display());
        Self { waiting, address, _directory: directory, _server: server }
    }

    async fn client(&self) -> StreamingClient {
        StreamingClient::new(Client::connect(&self.address).await.unwrap())
    }
}

fn message(package: &str, message: &impl Message, name: &str) -> Any {
    let value = message.write_to_bytes().unwrap();
    Any { type_url: format!("{package}.{name}"), value, ..Any::default() }
}

fn init(id: &str) -> Any {
    let init = StreamInit { id: id.to_owned(), ..StreamInit::default() };
    message("containerd.services.streaming.v1", &init, "StreamInit")
}

fn data(bytes: &[u8]) -> Any {
    message("containerd.types.transfer", &Data { data: bytes.to_vec(), ..Data::default() }, "Data")
}

fn window(update: i32) -> Any {
    let update = WindowUpdate { update, ..WindowUpdate::default() };
    message("containerd.types.transfer", &update, "WindowUpdate")
}

async fn open(client: &StreamingClient, id: &str) -> ClientStream<Any, Any> {
    let mut stream = client.stream(Context::default()).await.unwrap();
    // As Go's client begins.
    stream.send(&Any::default()).await.unwrap();
    stream.send(&init(id)).await.unwrap();
    assert_eq!(stream.recv().await.unwrap().type_url, "google.protobuf.Empty");
    stream
}

fn new_pipe() -> (std::os::fd::OwnedFd, std::os::fd::OwnedFd) {
    pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap()
}

#[tokio::test]
async fn what_a_client_sends_arrives_and_opens_the_window() {
    let host = Host::new().await;
    let client = host.client().await;
    let mut stream = open(&client, "in").await;
    let (read, write) = new_pipe();
    let _held = receive(host.waiting.clone(), "in".into(), host.waiting.take("in").unwrap(), write).unwrap();
    let mut read = pipe::Receiver::from_owned_fd(read).unwrap();
    let mut granted = 0;
    for piece in 0..20u8 {
        while granted < 16 * 1024 {
            granted += super::bytes::granted(&stream.recv().await.unwrap());
        }
        stream.send(&data(&[piece; 16 * 1024])).await.unwrap();
        granted -= 16 * 1024;
        let mut piece_read = vec![0; 16 * 1024];
        read.read_exact(&mut piece_read).await.unwrap();
        assert!(piece_read.iter().all(|byte| *byte == piece));
    }
    stream.close_send().await.unwrap();
    assert_eq!(read.read(&mut [0]).await.unwrap(), 0);
    // The call is over with the stream.
    while stream.recv().await.is_ok() {}
}

#[tokio::test]
async fn no_more_is_sent_than_the_window_allows_and_the_end_is_told() {
    let host = Host::new().await;
    let client = host.client().await;
    let mut stream = open(&client, "out").await;
    let (read, write) = new_pipe();
    let first = host.waiting.take("out").unwrap();
    let (_held, mut sent) = send(host.waiting.clone(), "out".into(), first, read).unwrap();
    let mut write = pipe::Sender::from_owned_fd(write).unwrap();
    write.write_all(&[1; 50_000]).await.unwrap();
    drop(write);
    let mut total = 0;
    while total < 50_000 {
        stream.send(&window(7_000)).await.unwrap();
        let mut of_window = 0;
        while of_window < 7_000 && total < 50_000 {
            let message = Data::parse_from_bytes(&stream.recv().await.unwrap().value).unwrap();
            of_window += message.data.len();
            total += message.data.len();
        }
        assert!(of_window <= 7_000);
    }
    stream.send(&window(1)).await.unwrap();
    assert!(stream.recv().await.is_err());
    sent.wait().await;
}

#[tokio::test]
async fn a_client_that_comes_back_goes_on_where_it_was() {
    let host = Host::new().await;
    let (read, write) = new_pipe();
    let client = host.client().await;
    let gone = open(&client, "out").await;
    let first = host.waiting.take("out").unwrap();
    let (held, mut sent) = send(host.waiting.clone(), "out".into(), first, read).unwrap();
    gone.send(&window(1000)).await.unwrap();
    drop((gone, client));
    let mut write = pipe::Sender::from_owned_fd(write).unwrap();
    write.write_all(b"later").await.unwrap();
    sent.wait().await;
    let client = host.client().await;
    let mut stream = open(&client, "out").await;
    stream.send(&window(100)).await.unwrap();
    let message = Data::parse_from_bytes(&stream.recv().await.unwrap().value).unwrap();
    assert_eq!(message.data, b"later");
    // Once the process is forgotten nobody is waited for.
    drop((stream, client, held));
    while write.write_all(&[0; 4096]).await.is_ok() {}
}

#[tokio::test]
async fn a_client_that_comes_back_takes_the_place_of_the_old_one() {
    let host = Host::new().await;
    let client = host.client().await;
    let old = open(&client, "in").await;
    let (read, write) = new_pipe();
    let _held = receive(host.waiting.clone(), "in".into(), host.waiting.take("in").unwrap(), write).unwrap();
    let newer = open(&client, "in").await;
    newer.send(&data(b"new")).await.unwrap();
    newer.close_send().await.unwrap();
    let mut text = String::new();
    pipe::Receiver::from_owned_fd(read).unwrap().read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "new");
    drop(old);
}

#[tokio::test]
async fn what_a_process_never_asked_for_ends_with_it() {
    let host = Host::new().await;
    let client = host.client().await;
    let (mut its, _other) = (open(&client, "x-stdin").await, open(&client, "y-stdin").await);
    let streams = Streams {
        stdin: "ttrpc+unix:///run/s.sock?streaming_id=x-stdin".to_owned(),
        stdout: "/run/fifo".to_owned(),
        ..Streams::default()
    };
    streams.renounce(&host.waiting);
    assert!(its.recv().await.is_err());
    assert!(host.waiting.take("y-stdin").is_some());
}

#[tokio::test]
async fn a_stream_that_begins_wrong_is_refused() {
    let host = Host::new().await;
    let client = host.client().await;
    for (first, sentence) in [(data(b"x"), "must begin with a StreamInit"), (init(""), "from 1 to 512 bytes")]
    {
        let mut stream = client.stream(Context::default()).await.unwrap();
        stream.send(&first).await.unwrap();
        let error = stream.recv().await.unwrap_err().to_string();
        assert!(error.contains(sentence), "{error}");
    }
}

#[tokio::test]
async fn whoever_asks_for_a_stream_before_it_is_open_gets_it_then() {
    let host = Host::new().await;
    let client = host.client().await;
    let waiting = host.waiting.clone();
    let asked = tokio::spawn(async move { waiting.next("late").await });
    tokio::task::yield_now().await;
    let _stream = open(&client, "late").await;
    asked.await.unwrap();
}

#[test]
fn names_are_bounded() {
    let waiting = Waiting::default();
    assert_eq!(waiting.check(""), Err(StreamError::Name));
    assert_eq!(waiting.check(&"x".repeat(513)), Err(StreamError::Name));
    assert_eq!(waiting.check("a"), Ok(()));
    assert!(waiting.take("a").is_none());
}

#[test]
fn types_are_known_by_name() {
    let any = |url: &str| Any { type_url: url.to_owned(), ..Any::default() };
    let is_init = |url: &str| is(&any(url), "StreamInit", "containerd.services.streaming.v1");
    assert!(is_init("containerd.services.streaming.v1.StreamInit"));
    assert!(is_init("type.googleapis.com/containerd.services.streaming.v1.StreamInit"));
    assert!(!is_init("containerd.services.streaming.v1.StreamInits"));
    assert!(!is_init(""));
}
