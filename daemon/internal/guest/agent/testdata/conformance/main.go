// Command conformance is what the conformance test runs in its containers, beside the tool of all tests.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(name string) error {
	switch name {
	case "view":
		v, err := look("/guest/proc", "/guest/cgroup")
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(v)
	case "sink": // takes all of its input
		n, err := io.Copy(io.Discard, os.Stdin)
		fmt.Println(n)
		return err
	case "flood": // writes for ever
		line := []byte(strings.Repeat("x", 4095) + "\n")
		for {
			if _, err := os.Stdout.Write(line); err != nil {
				return err
			}
		}
	default:
		return fmt.Errorf("unknown command %q", name)
	}
}

// view is what a guest holds, as its own /proc and control groups tell.
type view struct {
	// Start is when PID 1 began, in the kernel's ticks.
	Start string
	// Files, Threads and KiB are PID 1's open files by kind, its threads, and its memory.
	Files        map[string]int
	Threads, KiB int
	// Processes are all but the kernel's and the one that looks.
	Processes []string
	Mounts    []string
	Groups    []string
	// Tainted is not 0 once the kernel has had an accident.
	Tainted string
}

func look(proc, cgroup string) (view, error) {
	v := view{Files: make(map[string]int)}
	init, err := readStat(proc + "/1/stat")
	if err != nil {
		return v, err
	}
	v.Start = init[19]
	fds, err := os.ReadDir(proc + "/1/fd")
	if err != nil {
		return v, err
	}
	for _, fd := range fds {
		target, err := os.Readlink(proc + "/1/fd/" + fd.Name())
		if err != nil {
			continue // closed meanwhile
		}
		kind, _, _ := strings.Cut(target, ":[")
		v.Files[kind]++
	}
	status, err := os.ReadFile(proc + "/1/status")
	if err != nil {
		return v, err
	}
	for line := range strings.Lines(string(status)) {
		f := strings.Fields(line)
		switch f[0] {
		case "Threads:":
			v.Threads, _ = strconv.Atoi(f[1])
		case "VmRSS:":
			v.KiB, _ = strconv.Atoi(f[1])
		}
	}
	if v.Processes, err = processes(proc); err != nil {
		return v, err
	}
	mounts, err := os.ReadFile(proc + "/1/mountinfo")
	if err != nil {
		return v, err
	}
	for line := range strings.Lines(string(mounts)) {
		v.Mounts = append(v.Mounts, strings.Fields(line)[4])
	}
	slices.Sort(v.Mounts)
	groups, err := filepath.Glob(cgroup + "/*/cgroup.procs")
	if err != nil {
		return v, err
	}
	for _, g := range groups {
		v.Groups = append(v.Groups, filepath.Base(filepath.Dir(g)))
	}
	tainted, err := os.ReadFile(proc + "/sys/kernel/tainted")
	v.Tainted = strings.TrimSpace(string(tainted))
	return v, err
}

func processes(proc string) ([]string, error) {
	self, err := os.Readlink(proc + "/self")
	if err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob(proc + "/[0-9]*")
	if err != nil {
		return nil, err
	}
	var list []string
	for _, dir := range dirs {
		stat, err := readStat(dir + "/stat")
		pid := filepath.Base(dir)
		if err != nil || pid == self || pid == "2" || stat[1] == "2" {
			continue
		}
		name, _ := os.ReadFile(dir + "/comm")
		list = append(list, fmt.Sprintf("%s %s %s", pid, strings.TrimSpace(string(name)), stat[0]))
	}
	return list, nil
}

// readStat returns the fields of a stat file that follow the name: state, parent, …
func readStat(path string) ([]string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:])), nil
}
