package smtptest

import (
	"io"
	"net"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// delayWindow bounds the octets in flight in one direction of a delay line, so that a body of any size passes in constant memory.
// A relay on loopback cannot need as much in any realistic round trip.
const delayWindow = 16 << 20

// delayedLink is a link whose ends are a round trip apart. Between them are the real link, a lane in each direction, and a pipe:
// the relay reads and writes its end of the pipe.
//
//	client ═ raw ─ up lane ─> far ═ near ═ relay
//	             <─ down lane ─
type delayedLink struct {
	*netpipe.Conn // near
	raw           link
	delay         time.Duration
	closed        chan struct{} // closed by Close and Reset
	once          sync.Once
}

// delayed puts a delay line of the given round-trip time in front of raw. Nothing passes before opened, when the connection is
// established at the client's end. The goroutines that it starts are counted in wg; they end once the returned link is closed.
func delayed(raw link, delay time.Duration, opened time.Time, buffer int, wg *sync.WaitGroup) link {
	near, far := netpipe.New(buffer)
	l := &delayedLink{Conn: near, raw: raw, delay: delay, closed: make(chan struct{})}
	up := newLane(raw, far, delay/2, opened)
	down := newLane(far, raw, delay-delay/2, opened)
	wg.Go(up.load)
	wg.Go(up.deliver)
	wg.Go(down.load)
	wg.Go(down.deliver)
	wg.Go(func() { // ends when the link is closed, and the FIN or RST sent
		<-l.closed
		<-down.delivered
		raw.Close() // ends up.load
	})
	return l
}

func (l *delayedLink) RemoteAddr() net.Addr { return l.raw.RemoteAddr() }
func (l *delayedLink) LocalAddr() net.Addr  { return l.raw.LocalAddr() }

// Close sends FIN, or RST if something was left unread, after the data in flight to the client.
func (l *delayedLink) Close() error {
	err := l.Conn.Close()
	l.end()
	return err
}

// Reset sends RST after the data in flight to the client: on a real network a packet does not overtake all others either.
func (l *delayedLink) Reset() {
	l.Conn.Reset()
	l.end()
}

func (l *delayedLink) end() {
	l.once.Do(func() {
		// A client that does not read must not keep the last octets, and the goroutines, for ever.
		l.raw.SetWriteDeadline(time.Now().Add(l.delay + lingerTime))
		close(l.closed)
	})
}

// lane carries one direction of a delayedLink: load reads from src and timestamps what it reads, deliver writes it to dst when
// its time has come.
type lane struct {
	src, dst  link
	delay     time.Duration
	opened    time.Time
	delivered chan struct{} // closed when deliver has ended

	mu      sync.Mutex // guards the fields below; not held across I/O
	changed *sync.Cond // on mu
	queue   []packet
	size    int  // octets in queue
	lost    bool // dst accepts no more
}

// packet is what one read returned.
type packet struct {
	at   time.Time
	data []byte
	err  error // after data: io.EOF for FIN, anything else for RST
}

func newLane(src, dst link, delay time.Duration, opened time.Time) *lane {
	l := &lane{src: src, dst: dst, delay: delay, opened: opened, delivered: make(chan struct{})}
	l.changed = sync.NewCond(&l.mu)
	return l
}

// load runs until src ends.
func (l *lane) load() {
	buf := make([]byte, 32<<10)
	for {
		n, err := l.src.Read(buf)
		sent := time.Now()
		if sent.Before(l.opened) {
			sent = l.opened
		}
		p := packet{at: sent.Add(l.delay), data: append([]byte(nil), buf[:n]...), err: err}
		l.mu.Lock()
		for l.size >= delayWindow && !l.lost {
			l.changed.Wait()
		}
		l.queue = append(l.queue, p)
		l.size += n
		l.changed.Broadcast()
		l.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// deliver runs until it has delivered the end of src.
func (l *lane) deliver() {
	defer close(l.delivered)
	for {
		l.mu.Lock()
		for len(l.queue) == 0 {
			l.changed.Wait()
		}
		p := l.queue[0]
		l.queue = l.queue[1:]
		l.size -= len(p.data)
		l.changed.Broadcast()
		l.mu.Unlock()

		time.Sleep(time.Until(p.at))
		if len(p.data) > 0 && !l.lost {
			if _, err := l.dst.Write(p.data); err != nil {
				// The receiver has closed: TCP replies with RST, which the sender gets half a round trip later. Data that the
				// sender sends meanwhile is lost.
				time.Sleep(l.delay)
				l.src.Reset()
				l.mu.Lock()
				l.lost = true
				l.changed.Broadcast()
				l.mu.Unlock()
			}
		}
		switch {
		case p.err == nil:
		case l.lost:
			return
		case p.err == io.EOF:
			l.dst.CloseWrite()
			return
		default:
			l.dst.Reset()
			return
		}
	}
}
