from dprandp.cli import main

main()
