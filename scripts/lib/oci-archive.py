#!/usr/bin/env python3
"""oci-archive.py NAME LAYER.tar OUTPUT.tar [CMD…]

Wraps one uncompressed layer as an OCI image archive that `ctr image import`
takes, under the reference NAME. Same layer, same bytes.
"""
import hashlib
import io
import json
import sys
import tarfile

ENV = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]


def main():
    name, layer, output, *cmd = sys.argv[1:]
    sha, size = hashlib.sha256(), 0
    with open(layer, "rb") as f:
        while data := f.read(1 << 20):
            sha.update(data)
            size += len(data)
    diff_id = sha.hexdigest()

    out = tarfile.open(output, "w", format=tarfile.PAX_FORMAT)

    def blob(value):
        data = json.dumps(value, sort_keys=True).encode()
        digest = hashlib.sha256(data).hexdigest()
        add(f"blobs/sha256/{digest}", data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    def add(path, data):
        info = tarfile.TarInfo(path)
        info.size = len(data)
        out.addfile(info, io.BytesIO(data))

    kind = "application/vnd.oci.image."
    add("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    info = tarfile.TarInfo(f"blobs/sha256/{diff_id}")
    info.size = size
    with open(layer, "rb") as f:
        out.addfile(info, f)
    config = blob({"architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z",
                   "config": {"Env": ENV, "Cmd": cmd or ["/bin/sh"], "WorkingDir": "/"},
                   "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]}})
    manifest = blob({"schemaVersion": 2, "mediaType": f"{kind}manifest.v1+json",
                     "config": {"mediaType": f"{kind}config.v1+json", **config},
                     "layers": [{"mediaType": f"{kind}layer.v1.tar", "digest": f"sha256:{diff_id}",
                                 "size": size}]})
    index = {"schemaVersion": 2, "mediaType": f"{kind}index.v1+json", "manifests": [
        {"mediaType": f"{kind}manifest.v1+json", **manifest,
         "platform": {"architecture": "amd64", "os": "linux"},
         "annotations": {"io.containerd.image.name": name,
                         "org.opencontainers.image.ref.name": name.rsplit(":", 1)[-1]}}]}
    add("index.json", json.dumps(index, sort_keys=True).encode())
    out.close()


main()
