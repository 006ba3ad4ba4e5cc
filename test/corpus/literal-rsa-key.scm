(list (build-machine
  (name "ada")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQBkIMb2Tj7nmVQRCtoY/BO3hL4D5JkLz7AlGdt+XhIZVqUfPLkQ5lH01/njWNBzLIjp+dfM3QFFHI9yVnqcLfsbTgm4MC0jZM3hez5dNsX2AMNzifYs6WrfRdbqChH2qZRQQAaytNz4SbeI3CNqhqk219Ik0GzmgoIlyOnmmViJM+gQcPT285LTCaQlLczQVa9ehycc79S8E7s9L8YKWzKsQvsL7VGoPfR6K1QpIZe2TNYRObHzwQ2PkvmTvXLbwkx8lzH/mQmJv37eREhVMOo1BUokvMn5cKljUyUhC6nRItwN/nwX3fPJ9BDHmB5IjxPv+UGBWsWOZKqsdWYogkLm root@ada")))
