package sandbox

import (
	"testing"
	"time"
)

func TestPlan(t *testing.T) {
	rec := func(id string, s State) Record { return Record{ID: id, State: s} }
	for name, c := range map[string]struct {
		recs  []Record
		found []Instance
		want  verb
	}{
		"running and alive":       {[]Record{rec("a", Running)}, []Instance{{"a", true}}, adopt},
		"running and dead":        {[]Record{rec("a", Running)}, []Instance{{"a", false}}, lose},
		"running and gone":        {[]Record{rec("a", Running)}, nil, lose},
		"start cut off":           {[]Record{rec("a", Starting)}, []Instance{{"a", true}}, undo},
		"start cut off early":     {[]Record{rec("a", Starting)}, nil, undo},
		"stop cut off":            {[]Record{rec("a", Stopping)}, []Instance{{"a", true}}, finish},
		"stop cut off late":       {[]Record{rec("a", Stopping)}, nil, finish},
		"failed":                  {[]Record{rec("a", Failed)}, nil, keep},
		"failed, not all removed": {[]Record{rec("a", Failed)}, []Instance{{"a", false}}, undo},
		"unknown microVM":         {nil, []Instance{{"a", true}}, purge},
	} {
		steps := plan(c.recs, c.found)
		if len(steps) != 1 || steps[0].do != c.want || steps[0].id != "a" {
			t.Errorf("%s: %+v, want %s", name, steps, c.want)
		}
	}
}

func TestCPUPercentIsOfTheTimeSinceTheLastMeasurement(t *testing.T) {
	b := newEntry(Name{"default", "one"})
	t0 := time.Now()
	rec := Record{ID: "a", CreatedAt: t0}
	for _, c := range []struct {
		at, used time.Duration
		want     float64
	}{
		{time.Second, 500 * time.Millisecond, 50},
		{2 * time.Second, 2500 * time.Millisecond, 200},
		{2*time.Second + time.Millisecond, 3 * time.Second, 200}, // too soon: the same answer
		{4 * time.Second, 2500 * time.Millisecond, 0},
	} {
		if got := b.cpuPercent(rec, c.used, t0.Add(c.at)); got != c.want {
			t.Errorf("after %s: %v, want %v", c.at, got, c.want)
		}
	}
}
