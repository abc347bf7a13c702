// Modules: the cubins that ptxas made, of which names, registers and frames are read.
#include "modules.h"

#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "stub.h"

enum { MOST_FUNCTIONS = 16 };

// Records in the section .nv.info: a format, an attribute, a size, and for the format below a symbol and a value
enum { FORMAT_SIZED = 4, FRAME_SIZE = 0x11, REGISTER_COUNT = 0x2f };

typedef struct {
    int count;
    Function functions[MOST_FUNCTIONS];
} Module;

typedef struct {
    const char *base, *section_names, *symbol_names;
    const Elf64_Ehdr *header;
    const Elf64_Shdr *sections;
    const Elf64_Sym *symbols;
    unsigned symbol_count;
} Cubin;

static Cubin open_cubin(const void *image) {
    Cubin cubin = {.base = image, .header = image};
    cubin.sections = (const Elf64_Shdr *)(cubin.base + cubin.header->e_shoff);
    cubin.section_names = cubin.base + cubin.sections[cubin.header->e_shstrndx].sh_offset;
    for (int i = 0; i < cubin.header->e_shnum; i++) {
        const Elf64_Shdr *section = &cubin.sections[i];
        if (section->sh_type != SHT_SYMTAB) continue;
        cubin.symbols = (const Elf64_Sym *)(cubin.base + section->sh_offset);
        cubin.symbol_count = section->sh_size / sizeof(Elf64_Sym);
        cubin.symbol_names = cubin.base + cubin.sections[section->sh_link].sh_offset;
    }
    return cubin;
}

static Function *function_named(Module *module, const char *name) {
    for (int i = 0; i < module->count; i++) {
        if (!strcmp(module->functions[i].name, name)) return &module->functions[i];
    }
    return NULL;
}

static void read_functions(Module *module, const Cubin *cubin) {
    for (int i = 0; i < cubin->header->e_shnum && module->count < MOST_FUNCTIONS; i++) {
        const char *name = cubin->section_names + cubin->sections[i].sh_name;
        if (strncmp(name, ".text.", 6)) continue;
        int registers = (int)(cubin->sections[i].sh_info >> 24);
        module->functions[module->count++] = (Function){strdup(name + 6), registers, 0};
    }
}

static void read_record(Module *module, const Cubin *cubin, int attribute, const unsigned char *record) {
    uint32_t symbol, value;
    memcpy(&symbol, record, 4);
    memcpy(&value, record + 4, 4);
    if (symbol >= cubin->symbol_count) return;
    Function *function = function_named(module, cubin->symbol_names + cubin->symbols[symbol].st_name);
    if (!function) return;
    if (attribute == REGISTER_COUNT) function->registers = (int)value;
    if (attribute == FRAME_SIZE) function->spilled = (int)value;
}

static void read_info(Module *module, const Cubin *cubin) {
    for (int i = 0; i < cubin->header->e_shnum; i++) {
        const Elf64_Shdr *section = &cubin->sections[i];
        if (strcmp(cubin->section_names + section->sh_name, ".nv.info")) continue;
        const unsigned char *at = (const unsigned char *)cubin->base + section->sh_offset;
        const unsigned char *end = at + section->sh_size;
        while (at + 4 <= end) {
            uint16_t bytes;
            memcpy(&bytes, at + 2, 2);
            if (at[0] == FORMAT_SIZED && bytes >= 8) read_record(module, cubin, at[1], at + 4);
            at += 4 + (at[0] == FORMAT_SIZED ? bytes : 0);
        }
    }
}

CUresult cuModuleLoadData(CUmodule *out, const void *image) {
    cudaError_t error = forbidden_in_capture("cuModuleLoadData");
    if (error) return (CUresult)error;
    add_row((Row){.kind = "MODULE", .name = "cuModuleLoadData"}, NULL);
    if (fails_now("module")) return CUDA_ERROR_OUT_OF_MEMORY;
    Module *module = calloc(1, sizeof *module);
    if (!memcmp(image, ELFMAG, SELFMAG)) {
        Cubin cubin = open_cubin(image);
        read_functions(module, &cubin);
        if (cubin.symbols) read_info(module, &cubin);
    }
    *out = (CUmodule)module;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule *out, const void *image, unsigned count, CUjit_option *options, void **values) {
    return cuModuleLoadData(out, image);
}

CUresult cuModuleLoad(CUmodule *out, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    fseek(file, 0, SEEK_END);
    long bytes = ftell(file);
    rewind(file);
    char *image = malloc(bytes);
    bool whole = fread(image, 1, bytes, file) == (size_t)bytes;
    fclose(file);
    CUresult result = whole ? cuModuleLoadData(out, image) : CUDA_ERROR_INVALID_VALUE;
    free(image);
    return result;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }  // rows still name its functions

CUresult cuModuleGetFunction(CUfunction *out, CUmodule raw, const char *name) {
    Module *module = (Module *)raw;
    Function *function = function_named(module, name);
    if (!function && !module->count) {  // no cubin: a name is all that is known
        module->functions[module->count++] = (Function){strdup(name), -1, -1};
        function = module->functions;
    }
    *out = (CUfunction)function;
    return function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
