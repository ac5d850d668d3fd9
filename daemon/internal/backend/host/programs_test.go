package host

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestFindPrograms(t *testing.T) {
	program := func(output string) string {
		path := filepath.Join(t.TempDir(), "program")
		if err := os.WriteFile(path, []byte("#!/bin/sh\n[ \"$*\" = --version ] && echo '"+output+"'\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	rust, c := program("virtiofsd 1.13.2"), program("virtiofsd version 7.2.22 (Debian)\nCopyright (c) 2003-2022 Fabrice Bellard")
	if got, err := VirtiofsdCommand(t.Context(), rust, "/nowhere/translator"); err != nil || !slices.Equal(got, []string{rust}) {
		t.Errorf("Rust virtiofsd: %q, %v", got, err)
	}
	if got, err := VirtiofsdCommand(t.Context(), c, rust); err != nil || !slices.Equal(got, []string{rust, "--daemon=" + c}) {
		t.Errorf("C virtiofsd: %q, %v", got, err)
	}
	for path, find := range map[string]func() (any, error){
		"/nowhere/qemu":       func() (any, error) { return FindQEMU("/nowhere/qemu") },
		"/etc/passwd":         func() (any, error) { return FindQEMU("/etc/passwd") },
		"/nowhere/virtiofsd":  func() (any, error) { return FindVirtiofsd("/nowhere/virtiofsd") },
		"/nowhere/translator": func() (any, error) { return VirtiofsdCommand(t.Context(), c, "/nowhere/translator") },
	} {
		_, err := find()
		if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	t.Setenv("PATH", "/nowhere")
	_, err := FindQEMU("")
	if err == nil || !strings.Contains(err.Error(), "install Debian's package qemu-system-x86") {
		t.Errorf("without QEMU: %v", err)
	}
}
