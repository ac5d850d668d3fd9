package portal

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
)

func TestQueueServesInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := make(queue, 1)
		if err := q.acquire(t.Context()); err != nil {
			t.Fatal(err)
		}
		var order []int
		for i := range 20 {
			go func() {
				if err := q.acquire(t.Context()); err != nil {
					t.Error(err)
				}
				order = append(order, i)
				q.release()
			}()
			synctest.Wait()
		}
		q.release()
		synctest.Wait()
		if len(order) != 20 || !slices.IsSorted(order) {
			t.Errorf("the queue served the waiters in the order %v, want 0 to 19", order)
		}
	})
}

func TestQueueWaitEndsWithContext(t *testing.T) {
	q := make(queue, 1)
	if err := q.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := q.acquire(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("acquire with a canceled context: %v, want context.Canceled", err)
	}
	q.release()
	for range 100 {
		if err := q.acquire(ctx); !errors.Is(err, context.Canceled) {
			t.Fatalf("acquire of a free lock with a canceled context: %v, want context.Canceled", err)
		}
	}
	if err := q.acquire(t.Context()); err != nil {
		t.Errorf("acquire after that: %v", err)
	}
}
