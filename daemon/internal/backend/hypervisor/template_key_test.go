package hypervisor

import "testing"

// A template is found again after a restart of msbd, which measures the frequency of the time stamp counter again.
func TestTemplateKeyOfAnotherMeasurement(t *testing.T) {
	cfg := newConfig(t)
	cfg.Accelerator = "tcg"
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	measured := hostTSC
	t.Cleanup(func() { hostTSC = measured })
	keys := map[string]bool{}
	for _, khz := range []int{2445399, 2445400} {
		hostTSC = func() int { return khz }
		key, _, err := s.templateKey(testSpec(cfg, "one"))
		if err != nil {
			t.Fatal(err)
		}
		keys[key] = true
	}
	if len(keys) != 1 {
		t.Errorf("two measurements give the keys %v, want one", keys)
	}
}
