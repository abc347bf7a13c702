// A kernel that was compiled for the device.
#pragma once

typedef struct {
    char *name;
    int registers;
    int spilled;  // bytes of local memory a thread: the frame, which is where spills go
} Function;
