"""Certificates and tokens: made by `jaxdist launch certs`, asked for beyond loopback; only the job's are let in."""

import argparse
import datetime
import socket
import ssl
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from test_transport import big, endpoint, expect, until

from jaxdist.cli import launch_certs
from jaxdist.config.errors import UserError
from jaxdist.transport.credentials import Credentials, is_loopback, load_credentials
from jaxdist.transport.endpoint import Endpoint

x509 = pytest.importorskip("cryptography.x509")
from jaxdist.transport.certificates import make_certificates  # noqa: E402 - needs cryptography


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("job") / "certificates"
    make_certificates(directory, ["node-0", "10.0.0.3"], days=30)
    return directory


@pytest.fixture(scope="module")
def credentials(made: Path) -> Credentials:
    return load_credentials(made, "node-0")


def command(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launch_certs.add_parser(parser.add_subparsers())
    return parser.parse_args(["certs", *words])


def test_the_command_makes_files_that_only_their_owner_reads_and_that_openssl_verifies(tmp_path, capsys):
    assert launch_certs.run(command(str(tmp_path / "c"), "--hosts", "a, b.example.org,10.0.0.3", "--days", "7")) == 0
    files = {path.name: path for path in (tmp_path / "c").iterdir()}
    assert files.keys() == {"ca.pem", "token", "a.pem", "b.example.org.pem", "10.0.0.3.pem"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files.values())
    assert all(str(path) in capsys.readouterr().out for path in [files["ca.pem"]])
    authority = x509.load_pem_x509_certificate(files["ca.pem"].read_bytes())
    names = []
    for host in ("a", "b.example.org", "10.0.0.3"):
        certificate = x509.load_pem_x509_certificate(files[f"{host}.pem"].read_bytes())
        certificate.verify_directly_issued_by(authority)
        left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        assert datetime.timedelta(days=6.9) < left <= datetime.timedelta(days=7)
        names.append(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    assert names[0].get_values_for_type(x509.DNSName) == ["a"]
    assert [str(ip) for ip in names[2].get_values_for_type(x509.IPAddress)] == ["10.0.0.3"]
    assert len(bytes.fromhex(files["token"].read_text())) == 32
    assert b"PRIVATE" not in files["ca.pem"].read_bytes()


def test_nothing_is_written_over(made):
    before = {path: path.read_bytes() for path in made.iterdir()}
    with pytest.raises(UserError, match="are there already"):
        launch_certs.run(command(str(made), "--hosts", "node-0,another"))
    assert {path: path.read_bytes() for path in made.iterdir()} == before


@pytest.mark.parametrize("hosts", ["", "a,a", "../up", "a b", "ca", "a,,b", "-x"])
def test_names_that_are_no_hosts_are_refused(hosts, tmp_path):
    with pytest.raises(UserError, match="--hosts"):
        launch_certs.run(command(str(tmp_path / "c"), f"--hosts={hosts}"))
    assert not (tmp_path / "c").exists()


def test_days_must_be_some(tmp_path):
    with pytest.raises(UserError, match="above 0"):
        launch_certs.run(command(str(tmp_path), "--hosts", "a", "--days", "0"))


def test_a_certificate_is_chosen_by_the_hosts_name_or_because_it_is_the_only_one(made, tmp_path):
    assert load_credentials(made, "node-0").token == load_credentials(made, "10.0.0.3").token
    with pytest.raises(UserError, match=r"no certificate of node-7; there are: 10\.0\.0\.3, node-0"):
        load_credentials(made, "node-7")
    with pytest.raises(UserError, match="no certificate of"):
        load_credentials(made)  # of two, neither has this host's name
    make_certificates(tmp_path / "one", ["elsewhere"], days=1)
    assert load_credentials(tmp_path / "one").server is not None


def test_files_that_cannot_be_used_are_an_error_with_a_way_out(tmp_path):
    with pytest.raises(UserError, match="jaxdist launch certs"):
        load_credentials(tmp_path / "nowhere")
    make_certificates(tmp_path / "a", ["node"], days=1)
    (tmp_path / "a" / "node.pem").write_text("nothing")
    with pytest.raises(UserError, match=r"node\.pem cannot be used"):
        load_credentials(tmp_path / "a")
    (tmp_path / "a" / "token").write_text("short")
    make_certificates(tmp_path / "b", ["node"], days=1)
    (tmp_path / "a" / "node.pem").write_bytes((tmp_path / "b" / "node.pem").read_bytes())
    with pytest.raises(UserError, match="too easily guessed"):
        load_credentials(tmp_path / "a")


def test_beyond_loopback_there_must_be_certificates_or_a_word_that_there_need_not_be(credentials):
    plain = Credentials(credentials.token)
    for host in ("0.0.0.0", "", "::"):
        with pytest.raises(UserError, match=r"launch certs.*insecure: true"):
            Endpoint("a", plain, host=host)
    with endpoint("a") as a, pytest.raises(UserError, match="to connect to b at 192"):
        a.connect("b", ("192.0.2.1", 7777))
    Endpoint("a", plain, host="0.0.0.0", insecure=True).close()
    Endpoint("a", credentials, host="0.0.0.0").close()


def test_an_address_that_is_taken_or_nobodys_is_an_error():
    with endpoint("a") as a, pytest.raises(UserError, match="b cannot listen at"):
        endpoint("b", port=a.address[1])
    with pytest.raises(UserError, match="has no address"):
        is_loopback("no such host")


@pytest.mark.parametrize(
    ("host", "loopback"), [("localhost", True), ("127.3.2.1", True), ("::1", True), ("8.8.8.8", False)]
)
def test_loopback_is_what_cannot_be_reached_from_elsewhere(host, loopback):
    assert is_loopback(host) == loopback


@pytest.mark.parametrize("shared_memory", [False, True])
def test_members_of_a_job_talk_over_tls_1_3_both_ways(made, credentials, shared_memory):
    other = load_credentials(made, "10.0.0.3")
    with (
        Endpoint("a", credentials, host="0.0.0.0", shared_memory=shared_memory) as a,
        Endpoint("b", other, host="0.0.0.0", shared_memory=shared_memory) as b,
    ):
        a.connect("b", ("127.0.0.1", b.address[1]))
        for i in range(3):
            a.send("b", {"n": i}, [big(i, 12_345_678)])
            b.send("a", {"n": -i}, [big(-i, 12_345_678)])
            for receiver, n in ((b, i), (a, -i)):
                received = expect(receiver)
                assert received.header == {"n": n}
                np.testing.assert_array_equal(received.arrays[0], big(n, 12_345_678))
        assert (a.traffic()["b"].memory_bytes_sent > 0) == shared_memory
        assert not a.refused
        assert not b.refused


@pytest.fixture(scope="module")
def expired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a job whose time has run out."""
    directory = tmp_path_factory.mktemp("job") / "expired"
    make_certificates(directory, ["node"], days=1e-5)
    time.sleep(1.5)
    return directory


def strangers(made: Path, credentials: Credentials) -> dict[str, Credentials]:
    foreign = made.parent / "foreign"
    if not foreign.exists():
        make_certificates(foreign, ["node-0"], days=1)
    of_foreign = load_credentials(foreign)
    without = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    without.check_hostname = False
    without.load_verify_locations(made / "ca.pem")
    return {
        "another job": of_foreign,
        "another job, and the token": Credentials(credentials.token, of_foreign.server, of_foreign.client),
        "no certificate": Credentials(credentials.token, credentials.server, without),
        "no TLS": Credentials(credentials.token),
        "another token": Credentials(b"z" * 32, credentials.server, credentials.client),
    }


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("another job", "TLS: alert unknown ca"),
        ("another job, and the token", "TLS: alert unknown ca"),
        ("no certificate", "TLS: peer did not return a certificate"),
        ("no TLS", "TLS: wrong version number"),
        ("another token", "wrong token"),
    ],
)
def test_strangers_are_refused_logged_and_counted_and_members_do_not_notice(made, credentials, caplog, who, reason):
    stranger = strangers(made, credentials)[who]
    with Endpoint("server", credentials) as server, Endpoint("good", credentials) as good:
        good.connect("server", server.address)
        with Endpoint("stranger", stranger) as outside:
            outside.connect("server", server.address)
            outside.send("server", {"let": "me in"}, [big()])
            until(lambda: server.refused[reason] >= 2)
            good.send("server", {"n": 1}, [big()])
            assert expect(server).sender == "good"
        assert "stranger" not in server.traffic()
        assert set(server.refused) <= {reason, "gone"}
    assert "server refused a connection" in caplog.text


def test_a_foreign_certificate_is_refused_though_its_owner_trusts_everybody(made, credentials):
    foreign = strangers(made, credentials)["another job"]
    foreign.client.verify_mode = ssl.CERT_NONE
    with Endpoint("server", credentials) as server:
        connected = foreign.client.wrap_socket(socket.create_connection(server.address))
        until(lambda: any(reason.startswith("certificate: ") for reason in server.refused))
        connected.close()


def test_an_expired_certificate_is_refused_by_either_end(expired):
    members = load_credentials(expired)
    with Endpoint("server", members) as server, Endpoint("client", members) as client:
        client.connect("server", server.address)  # the client finds out first
        until(lambda: server.refused["TLS: alert certificate expired"] >= 1)
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.check_hostname = False
        trusting.verify_mode = ssl.CERT_NONE
        trusting.load_cert_chain(expired / "node.pem")
        connected = trusting.wrap_socket(socket.create_connection(server.address))
        until(lambda: server.refused["certificate: certificate has expired"] == 1)
        connected.close()


def test_older_tls_is_not_spoken(made, credentials):
    with Endpoint("server", credentials) as server:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname = False
        old.load_verify_locations(made / "ca.pem")
        old.load_cert_chain(made / "node-0.pem")
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(server.address) as connected, pytest.raises(ssl.SSLError):
            old.wrap_socket(connected)
        until(lambda: sum(server.refused.values()) == 1)
