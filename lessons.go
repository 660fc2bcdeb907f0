package smtprelay

import "sync"

// lessons tells the Trace what the profile learns. A lesson is learnt under locks of the pool or of a connection, which a hook
// may need, so a goroutine tells it; there is one while there is something to tell.
type lessons struct {
	tell func(LearnedInfo) // nil: nobody wants to know; set before the first lesson

	mu      sync.Mutex // guards the fields below; never held across tell
	queue   []LearnedInfo
	telling bool          // the goroutine runs
	done    chan struct{} // closed when it ends
}

const lessonsMost = 256 // lessons that wait to be told

// learned has info told. It takes no other lock and returns at once.
func (l *lessons) learned(info LearnedInfo) {
	if l.tell == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.queue) >= lessonsMost {
		return
	}
	l.queue = append(l.queue, info)
	if !l.telling {
		l.telling, l.done = true, make(chan struct{})
		go l.run()
	}
}

func (l *lessons) run() {
	for {
		l.mu.Lock()
		if len(l.queue) == 0 {
			l.telling = false
			close(l.done)
			l.mu.Unlock()
			return
		}
		info := l.queue[0]
		l.queue = l.queue[1:]
		l.mu.Unlock()
		l.tell(info)
	}
}

// told returns when all that was learnt has been told.
func (l *lessons) told() {
	l.mu.Lock()
	telling, done := l.telling, l.done
	l.mu.Unlock()
	if telling {
		<-done
	}
}
