"""Carries plans out: devices, buffers, streams. The only room that needs torch; import its modules one by one."""
