"""Many nodes on paper: how recorded agents fare by how they are placed."""
