package sandbox

import (
	"testing"
	"time"
)

func TestPlan(t *testing.T) {
	rec := func(id string, s State) Record { return Record{ID: id, Name: Name{"default", "x"}, State: s} }
	pooled := func(s State) []Record { return []Record{{ID: "a", State: s}} }
	for name, c := range map[string]struct {
		recs  []Record
		found []Instance
		want  action
	}{
		"running and alive":       {[]Record{rec("a", Running)}, []Instance{{"a", true}}, actionAdopt},
		"running and dead":        {[]Record{rec("a", Running)}, []Instance{{"a", false}}, actionLose},
		"running and gone":        {[]Record{rec("a", Running)}, nil, actionLose},
		"starting":                {[]Record{rec("a", Starting)}, []Instance{{"a", true}}, actionUndo},
		"starting, no microVM":    {[]Record{rec("a", Starting)}, nil, actionUndo},
		"stopping":                {[]Record{rec("a", Stopping)}, []Instance{{"a", true}}, actionFinish},
		"stopping, no microVM":    {[]Record{rec("a", Stopping)}, nil, actionFinish},
		"failed":                  {[]Record{rec("a", Failed)}, nil, actionKeep},
		"failed, microVM remains": {[]Record{rec("a", Failed)}, []Instance{{"a", false}}, actionUndo},
		"pooled and alive":        {pooled(Pooled), []Instance{{"a", true}}, actionPool},
		"pooled and dead":         {pooled(Pooled), []Instance{{"a", false}}, actionFinish},
		"pooled and gone":         {pooled(Pooled), nil, actionFinish},
		"refill":                  {pooled(Starting), []Instance{{"a", true}}, actionFinish},
		"refill, no microVM":      {pooled(Starting), nil, actionFinish},
		"unknown microVM":         {nil, []Instance{{"a", true}}, actionPurge},
	} {
		steps := plan(c.recs, c.found)
		if len(steps) != 1 || steps[0].action != c.want || steps[0].id != "a" {
			t.Errorf("%s: got %+v, want one step %q of a", name, steps, c.want)
		}
	}
}

func TestCPUPercentSinceLastMeasurement(t *testing.T) {
	e := newEntry(Name{"default", "one"})
	t0 := time.Now()
	rec := Record{ID: "a", CreatedAt: t0, CPUNanos: int64(100 * time.Millisecond)} // what the microVM had used before
	for _, c := range []struct {
		at, used time.Duration
		want     float64
	}{
		{time.Second, 600 * time.Millisecond, 50},
		{2 * time.Second, 2600 * time.Millisecond, 200},
		{2*time.Second + time.Millisecond, 3 * time.Second, 200}, // too soon: same result as before
		{4 * time.Second, 2500 * time.Millisecond, 0},
	} {
		if got := e.cpuPercent(rec, c.used, t0.Add(c.at)); got != c.want {
			t.Errorf("after %s: got %v, want %v", c.at, got, c.want)
		}
	}
}
