//! TLS: a real client's handshake, certificates that change, files that are wrong, handshakes that never end.

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use support::{TestOptions, TestServer};
use tandem::http::{ServeOptions, Tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> (Files, CertificateDer<'static>) {
        let files = Files { folder: tempfile::tempdir().expect("a folder") };
        let certificate = files.renew();
        (files, certificate)
    }

    fn cert(&self) -> PathBuf {
        self.folder.path().join("cert.pem")
    }

    fn key(&self) -> PathBuf {
        self.folder.path().join("key.pem")
    }

    /// Writes a new certificate and its key.
    fn renew(&self) -> CertificateDer<'static> {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        std::fs::write(self.cert(), made.cert.pem()).expect("written");
        std::fs::write(self.key(), made.signing_key.serialize_pem()).expect("written");
        made.cert.der().clone()
    }

    fn open(&self) -> Arc<Tls> {
        Arc::new(Tls::open(&self.cert(), &self.key()).expect("the files are in order"))
    }
}

async fn start(tls: Arc<Tls>, serve: ServeOptions) -> TestServer {
    TestServer::start(TestOptions { tls: Some(tls), serve, ..TestOptions::default() }).await
}

/// The status line of `/health`, asked by a client that trusts this certificate only.
async fn ask(server: &TestServer, trusted: &CertificateDer<'static>) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).expect("a certificate");
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").expect("a name");
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, server.connect().await).await?;
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn a_client_is_served_and_a_renewed_certificate_is_taken_into_use() {
    let (files, first) = Files::new();
    let tls = files.open();
    let server = start(tls.clone(), ServeOptions::default()).await;
    assert_eq!(ask(&server, &first).await.expect("served"), "HTTP/1.1 200 OK");
    let second = files.renew();
    // The server looks by itself, every other second; asking it is the same and sooner.
    tls.reload().expect("the new files are in order");
    assert_eq!(ask(&server, &second).await.expect("served"), "HTTP/1.1 200 OK");
    assert!(ask(&server, &first).await.is_err(), "the old one is gone");
    // Half a renewal: what is in use stays.
    std::fs::write(files.cert(), "").expect("written");
    assert!(tls.reload().is_err());
    assert_eq!(ask(&server, &second).await.expect("served"), "HTTP/1.1 200 OK");
    server.stop().await;
}

#[tokio::test]
async fn changed_files_are_noticed() {
    let (files, _) = Files::new();
    let server = start(files.open(), ServeOptions::default()).await;
    // Times of files are coarse on some systems.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let second = files.renew();
    for _ in 0..600 {
        if ask(&server, &second).await.is_ok() {
            server.stop().await;
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the new certificate never came into use");
}

#[tokio::test]
async fn plain_text_and_half_a_handshake_are_closed() {
    let (files, certificate) = Files::new();
    let serve = ServeOptions { header_timeout: Duration::from_millis(150), ..ServeOptions::default() };
    let server = start(files.open(), serve).await;
    let mut plain = server.connect().await;
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").await.expect("written");
    let mut silent = server.connect().await;
    let mut half = server.connect().await;
    // The head of a ClientHello that says there is more to come.
    half.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]).await.expect("written");
    for stream in [&mut plain, &mut silent, &mut half] {
        let mut received = Vec::new();
        // Ends, by a close or a reset.
        let _ = stream.read_to_end(&mut received).await;
        assert!(!received.starts_with(b"HTTP/1.1 200"), "{received:?}");
    }
    assert_eq!(ask(&server, &certificate).await.expect("served"), "HTTP/1.1 200 OK");
    server.stop().await;
}

#[test]
fn wrong_files_are_named_with_what_is_wrong() {
    let (files, _) = Files::new();
    let (other, _) = Files::new();
    let open = |cert: &Path, key: &Path| Tls::open(cert, key).err().expect("refused").to_string();
    let missing = open(&files.folder.path().join("none.pem"), &files.key());
    assert!(missing.contains("certificate") && missing.contains("none.pem"), "{missing}");
    let swapped = open(&files.key(), &files.cert());
    assert!(swapped.contains("key.pem") && swapped.contains("no CERTIFICATE"), "{swapped}");
    let no_key = open(&files.cert(), &files.cert());
    assert!(no_key.contains("cert.pem") && no_key.contains("no PRIVATE KEY"), "{no_key}");
    let mismatch = open(&files.cert(), &other.key());
    assert!(mismatch.contains("cannot be used together"), "{mismatch}");
    std::fs::write(files.cert(), "-----BEGIN CERTIFICATE-----\nAAAA").expect("written");
    let broken = open(&files.cert(), &files.key());
    assert!(broken.contains("cert.pem"), "{broken}");
}
