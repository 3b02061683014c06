"""What any script needs.

UserError                            # the user can mend it: one message, exit code 2
run_script(main, config)             # ends with 0, or 2 and the message
atomic_write(path) -> file           # whole or not at all
lock_folder(folder, flag)            # held by one run
gather(work) -> results              # of all processes
ask_main(work) -> result             # of the main one
"""
