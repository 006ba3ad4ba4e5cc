(load "/etc/offload-corpus/files/nothing.scm")
