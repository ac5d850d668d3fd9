//go:build !linux

package main

import (
	"errors"
	"syscall"
	"time"
)

// msbd runs on Linux only, so nothing here is called: requireLinux refuses the commands that would.

type process struct{}

func openProcess(int) (process, error)           { return process{}, errors.ErrUnsupported }
func (process) close()                           {}
func (process) wait(time.Duration) (bool, error) { return false, errors.ErrUnsupported }

var newSession *syscall.SysProcAttr

const noFollow = 0
