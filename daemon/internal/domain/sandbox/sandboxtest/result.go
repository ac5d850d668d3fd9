package sandboxtest

import (
	"io"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Result is what became of a process.
type Result struct {
	ExitCode       int
	Stdout, Stderr string
}

// Read reads the events of a process to the end, and closes it. It takes what a method that starts one returns.
func Read(p sandbox.Process, err error) (r Result, _ error) {
	if err != nil {
		return r, err
	}
	defer p.Close()
	for {
		event, err := p.Next()
		if err == io.EOF {
			return r, nil
		}
		if err != nil {
			return r, err
		}
		switch event := event.(type) {
		case sandbox.Exit:
			r.ExitCode = event.Code
		case sandbox.Output:
			if event.Stream == sandbox.Stderr {
				r.Stderr += string(event.Data)
			} else {
				r.Stdout += string(event.Data)
			}
		}
	}
}
