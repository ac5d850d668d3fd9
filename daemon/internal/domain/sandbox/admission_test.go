package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/msbd/msbd/daemon/internal/sys/randtest"
)

// admissionModel checks the rules of an admission after each of many random operations on it.
type admissionModel struct {
	*testing.T
	*admission
	rnd       *rand.Rand
	available uint64
	removals  []func()
	// places are the starts that have not left, in the order in which they came.
	places []*modelPlace
	// decidedSince counts, for each namespace with waiting starts, how many starts of each namespace were decided since it waits.
	decidedSince                   map[string]map[string]int
	admitted, refused, memoryWaits int
}

type modelPlace struct {
	*place
	isDecided bool
}

const (
	modelTotal   = 16 << 30
	modelReserve = modelTotal / 20
)

// Whatever starts, ends, is canceled and is removed: at most as many starts as there are slots are in progress, none has memory
// that the host or another start does not have, none is overtaken by a later one of its namespace, the namespaces take turns, and
// none waits although nothing is in progress or although it could be admitted.
func TestAdmissionRules(t *testing.T) {
	m := &admissionModel{T: t, rnd: randtest.New(t), available: modelTotal, decidedSince: map[string]map[string]int{}}
	m.admission = &admission{slots: 3, memory: func() (uint64, uint64, error) { return m.available, modelTotal, nil }}
	for range 20_000 {
		m.step()
	}
	for len(m.places) > 0 { // all starts end
		i := slices.IndexFunc(m.places, func(p *modelPlace) bool { return p.isDecided })
		if i < 0 {
			for _, end := range m.removals {
				end()
			}
			m.removals = nil
			m.check()
			continue
		}
		m.end(i)
		m.check()
	}
	if m.booting != 0 || m.reserved != 0 || len(m.waiting) != 0 {
		t.Errorf("after the last start: %d in progress with %d bytes, waiting: %v", m.booting, m.reserved, m.waiting)
	}
	if m.admitted < 100 || m.refused < 100 || m.memoryWaits < 100 {
		t.Errorf("the test admitted %d starts, refused %d, and saw %d waits for memory, want at least 100 of each", m.admitted, m.refused, m.memoryWaits)
	}
}

func (m *admissionModel) step() {
	switch m.rnd.IntN(10) {
	case 0, 1, 2, 3:
		if len(m.places) > 50 {
			break
		}
		namespace := string(rune('a' + m.rnd.IntN(4)))
		memory := uint64(1+m.rnd.IntN(1<<m.rnd.IntN(5))) << 30 // small ones are more frequent
		before := m.snapshot()
		p, err := m.enter(namespace, memory)
		if err != nil {
			if before.free >= memory && before.booting < m.slots && before.waiters == 0 {
				m.Fatalf("refused a start of %d GiB with %d GiB free: %v", memory>>30, before.free>>30, err)
			}
			m.refused++
			break
		}
		m.places = append(m.places, &modelPlace{place: p})
	case 4, 5:
		if i := slices.IndexFunc(m.places, func(p *modelPlace) bool { return p.isDecided }); i >= 0 {
			m.end(i)
		}
	case 6:
		if len(m.places) > 0 {
			m.end(m.rnd.IntN(len(m.places)))
		}
	case 7:
		if len(m.removals) < 3 {
			m.removals = append(m.removals, m.admission.free())
		}
	case 8:
		if len(m.removals) > 0 {
			m.changeAvailable()
			m.removals[0]()
			m.removals = m.removals[1:]
		}
	case 9:
		m.changeAvailable()
		m.admission.free()() // a removal that was very short
	}
	m.check()
}

func (m *admissionModel) changeAvailable() {
	m.available = modelTotal - m.rnd.Uint64N(modelTotal/2)*m.rnd.Uint64N(3)
}

// end ends or cancels a start.
func (m *admissionModel) end(i int) {
	p := m.places[i]
	m.places = slices.Delete(m.places, i, i+1)
	m.leave(p.place)
	m.leave(p.place) // does nothing
}

type admissionSnapshot struct {
	free             uint64
	booting, waiters int
}

func (m *admissionModel) snapshot() admissionSnapshot {
	free, _, _ := m.room()
	return admissionSnapshot{free, m.booting, m.admission.waiters()}
}

func (m *admissionModel) check() {
	m.Helper()
	booting, reserved := 0, uint64(0)
	waits := map[string]bool{}
	for _, p := range m.places {
		select {
		case <-p.decided:
		default:
			waits[p.namespace] = true
			continue
		}
		if !p.isDecided {
			p.isDecided = true
			if waits[p.namespace] {
				m.Fatalf("a start of namespace %s overtook an earlier one", p.namespace)
			}
			for _, counts := range m.decidedSince {
				counts[p.namespace]++
			}
			if p.err == nil {
				m.admitted++
				if m.available < modelReserve+m.reserved {
					m.Fatalf("admitted a start of %d GiB with %d GiB available and %d GiB reserved", p.memory>>30, m.available>>30, m.reserved>>30)
				}
			} else {
				m.refused++
			}
		}
		if p.err == nil {
			booting, reserved = booting+1, reserved+p.memory
		}
	}
	for waiting, counts := range m.decidedSince {
		for namespace, turns := range counts {
			if waits[waiting] && turns > counts[waiting]+1 {
				m.Fatalf("while starts of namespace %s waited, it had %d turns, and namespace %s %d", waiting, counts[waiting], namespace, turns)
			}
		}
	}
	maps.DeleteFunc(m.decidedSince, func(namespace string, _ map[string]int) bool { return !waits[namespace] })
	for namespace := range waits {
		if m.decidedSince[namespace] == nil {
			m.decidedSince[namespace] = map[string]int{}
		}
	}
	if booting > m.slots || booting != m.booting || reserved != m.reserved {
		m.Fatalf("%d starts with %d bytes are in progress in %d slots; the admission counts %d with %d", booting, reserved, m.slots, m.booting, m.reserved)
	}
	if len(waits) == 0 {
		return
	}
	if booting == 0 && len(m.removals) == 0 {
		m.Fatal("a start waits, but nothing is in progress that could end its wait")
	}
	if booting < m.slots {
		m.memoryWaits++
		if free, _, _ := m.room(); !slices.ContainsFunc(m.waiting, func(q startQueue) bool { return q.starts[0].memory > free }) {
			m.Fatal("a start waits, but there is a slot and memory for all that are next in their namespaces")
		}
	}
}

func TestWaitingStartsAreBounded(t *testing.T) {
	a := &admission{slots: 1, memory: func() (uint64, uint64, error) { return modelTotal, modelTotal, nil }}
	enter := func(namespace string) error { _, err := a.enter(namespace, 1<<30); return err }
	if err := enter("first"); err != nil {
		t.Fatal(err)
	}
	for _, namespace := range []string{"a", "b", "c", "d"} {
		for range maxWaitingEach {
			if err := enter(namespace); err != nil {
				t.Fatal(err)
			}
		}
		refusal, ok := errors.AsType[*Refusal](enter(namespace))
		if !ok || refusal.Error() != fmt.Sprintf("256 starts wait in namespace %s, and no more can; try again later", namespace) || refusal.RetryAfter != retryStart {
			t.Errorf("one start too many in a namespace: %v", refusal)
		}
	}
	refusal, ok := errors.AsType[*Refusal](enter("e"))
	if !ok || refusal.Error() != "1024 starts wait in all namespaces together, and no more can; try again later" || refusal.RetryAfter != retryStart {
		t.Errorf("one start too many: %v", refusal)
	}
}

// A wait ends with its context. If the start was admitted at the same moment, its slot is not lost.
func TestCanceledWaitLosesNoSlot(t *testing.T) {
	a := &admission{slots: 1, memory: func() (uint64, uint64, error) { return modelTotal, modelTotal, nil }}
	first, _ := a.enter("a", 1<<30)
	second, _ := a.enter("a", 1<<30)
	third, _ := a.enter("a", 1<<30)
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("canceled")
	cancel(cause)
	if err := a.wait(ctx, second); err != cause {
		t.Errorf("got error %v, want %v", err, cause)
	}
	a.leave(first) // admits the second one
	a.leave(second)
	select {
	case <-third.decided:
	default:
		t.Error("the third start was not admitted")
	}
}
