"""Makes nodes on one Linux machine: network namespaces, late links, memory limits."""
