package stream

import (
	"errors"
	"testing"

	"github.com/containerd/errdefs"
)

// FuzzExecFrames decodes text frames of a client. A frame is either valid or refused with a short message.
func FuzzExecFrames(f *testing.F) {
	for _, frame := range []string{
		`{"command":"sh","args":["-c","ls"],"cwd":"/","envs":["A=1"],"user":"u","terminal":{"cols":80,"rows":24},"stdin":true,"tag":"t","timeout":1,"grace":1,"with_connection":true}`,
		`{"command":"x","timeout":1e400}`, `{"command":"x","timeout":1e300}`, `{"command":"x","timeout":1e-300}`, `{"command":null}`, `{"command":"x","stdin":null}`,
		`{"resize":[80,24]}`, `{"resize":[0,0]}`, `{"resize":null}`, `{"close_stdin":true}`, `{"signal":"INT","all":true}`, `{"signal":"64"}`, `null`, `[]`, `{}`, "\xff", "",
	} {
		f.Add([]byte(frame))
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		check := func(err error) {
			var m *mistake
			if err != nil && !errors.As(err, &m) && !errdefs.IsInvalidArgument(err) || err != nil && len(err.Error()) > 2000 {
				t.Errorf("error %.3000q", err)
			}
		}
		req, err := parseStart(frame)
		check(err)
		if err == nil && (req.Program == "" || req.Timeout < 0 || req.Grace < 0 || req.Environment.Env != nil || req.Input != nil) {
			t.Errorf("the frame %q asks for %+v", frame, req)
		}
		c, err := parseControl(frame)
		check(err)
		if err != nil {
			return
		}
		set := 0
		if c.resize != nil {
			set++
			if c.resize.Columns == 0 || c.resize.Rows == 0 {
				t.Errorf("the frame %q asks for the size %+v", frame, c.resize)
			}
		}
		if c.closeInput {
			set++
		}
		if c.signal != 0 {
			set++
		}
		if set != 1 || c.signal < 0 || c.signal > 64 || c.all && c.signal == 0 {
			t.Errorf("the frame %q asks for %+v", frame, c)
		}
	})
}
