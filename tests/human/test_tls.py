"""The server with a certificate of its own: TLS alone, cookies that go nowhere else."""

import shutil
import ssl
import subprocess
from pathlib import Path

import httpx2
import pytest

from synpref_ray.errors import InputError
from synpref_ray.human.serving import ServeConfig, check_files
from tests.human.live import LiveServer
from tests.human.site import SECRET, SmallSite, hidden

OPENSSL = shutil.which("openssl")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not OPENSSL, reason="no openssl here to make a certificate with")]


def test_it_is_served_over_tls_and_not_in_plain_text(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    make = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=annotation -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run([str(OPENSSL), *make.split()], check=True, capture_output=True)
    (tmp_path / "annotation").mkdir()
    site = SmallSite(tmp_path / "annotation")
    site.user("ann")
    make = f"genrsa -aes128 -passout pass:x -out {tmp_path / 'locked.pem'} 2048", f"genrsa -out {tmp_path / 'other.pem'} 2048"
    for words in make:
        subprocess.run([str(OPENSSL), *words.split()], check=True, capture_output=True)
    for wrong, why in (("locked", "passphrase"), ("other", "another certificate")):
        with pytest.raises(InputError, match=why):
            check_files(ServeConfig(tls_certificate=str(certificate), tls_key=str(tmp_path / f"{wrong}.pem")))
    with LiveServer(tmp_path, f"serve.tls_certificate={certificate}", f"serve.tls_key={key}") as server:
        assert server.url.startswith("https://127.0.0.1:")
        with httpx2.Client(base_url=server.url, verify=ssl.create_default_context(cafile=str(certificate)), timeout=60) as client:
            page = client.get("/login")
            assert "max-age" in page.headers["strict-transport-security"]
            answer = client.post("/login", data={"csrf": hidden(page.text, "csrf"), "name": "ann", "secret": SECRET})
            assert answer.status_code == 303
            cookies = answer.headers.get_list("set-cookie")
            assert any(cookie.startswith("__Host-session=") and "Secure" in cookie and "HttpOnly" in cookie for cookie in cookies)
            assert client.get("/").status_code == 200
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"http://127.0.0.1:{server.port}/login", timeout=60)
