"""The node's status in Kubernetes."""

from __future__ import annotations

import json
import os
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from agentcgroupd.errors import AgentcgroupdError, ConfigError

RESOURCE = "agentcgroup.dev/agents"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ANSWER_S = 10.0


class NotTold(AgentcgroupdError):
    """The cluster has not taken the number; expected while its API server is away."""


class Node:
    """A node of the cluster, whose number of agents is kept."""

    def __init__(self, url: str, name: str, account: Path) -> None:
        """`url`: of the API server; `account`: the directory of the pod's service account."""
        path = urllib.parse.quote(name, safe="")
        self._url = f"{url}/api/v1/nodes/{path}/status"
        self._account = account
        authority = account / "ca.crt"
        self._tls = None
        if url.startswith("https:"):
            self._tls = ssl.create_default_context(cafile=str(authority))

    @classmethod
    def of_environment(cls, environ: Mapping[str, str] = os.environ) -> Node:
        """The node that this pod is on, by NODE_NAME, at the API server that the kubelet names.
        Raises ConfigError."""
        try:
            host, port = environ["KUBERNETES_SERVICE_HOST"], environ["KUBERNETES_SERVICE_PORT"]
            name = environ["NODE_NAME"]
        except KeyError as missing:
            raise ConfigError(f"{missing} is not set: this is for a pod in a cluster") from None
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", name, ACCOUNT)

    def tell(self, agents: int) -> None:
        """Set the node's capacity of agents. Raises NotTold."""
        # A slash in a name is written ~1 in a path of JSON Patch (RFC 6901).
        path = f"/status/capacity/{RESOURCE.replace('/', '~1')}"
        body = json.dumps([{"op": "add", "path": path, "value": str(agents)}]).encode()
        try:
            # Read each time: the kubelet renews it.
            token = (self._account / "token").read_text().strip()
            request = urllib.request.Request(
                self._url,
                body,
                {
                    "Authorization": f"Bearer {token}",
                    "Content-Type": "application/json-patch+json",
                    "Accept": "application/json",
                },
                method="PATCH",
            )
            with urllib.request.urlopen(request, timeout=ANSWER_S, context=self._tls):
                return
        except urllib.error.HTTPError as error:
            said = error.read(500).decode("utf-8", "replace")
            raise NotTold(f"the API server answers {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            raise NotTold(f"the API server: {error}") from None
