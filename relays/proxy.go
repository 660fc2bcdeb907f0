package main

import (
	"bytes"
	"context"
	"net"
	"sync"
	"time"
)

// A proxy stands between the client and a relay's plaintext port. It counts, can delay replies so that what the client sends
// ahead of them becomes visible, and breaks one connection on request.
type proxy struct {
	listener net.Listener
	target   string
	delay    time.Duration // of the relay's replies
	all      sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	cut     *cut       // nil if there is nothing to break, or it is broken already
	open    int
	maxOpen int
	passes  []*pass
}

// A cut breaks the connection that a message crosses.
type cut struct {
	marker []byte // the last line of the message's body, with its CRLF
	behind bool   // break right after the end of the message, before the relay's reply to it; else inside marker
	reset  bool   // with RST; else with FIN
}

// A pass is one connection through the proxy.
type pass struct {
	client, relay *net.TCPConn

	mu     sync.Mutex // guards the fields below
	muted  bool       // the relay's replies are not forwarded any more
	fromUs []byte     // what the client has sent
	answer []answer
}

// answer is something the relay sent, and how much the client had sent when it was forwarded.
type answer struct {
	text   []byte
	behind int // bytes of fromUs
}

func newProxy(target string, delay time.Duration) (*proxy, error) {
	l, err := listen()
	if err != nil {
		return nil, err
	}
	p := &proxy{listener: l, target: target, delay: delay}
	p.all.Go(p.serve)
	return p, nil
}

// listen opens a port for plain TCP. On Linux a Go listener also accepts Multipath TCP, which does not forward a reset.
func listen() (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	return lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
}

func (p *proxy) address() string { return p.listener.Addr().String() }

// close ends the proxy and waits until the relay has closed every connection that came through it.
func (p *proxy) close() {
	p.listener.Close()
	p.all.Wait()
}

func (p *proxy) arm(c cut) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = &c
}

// serve runs until the listener is closed.
func (p *proxy) serve() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return
		}
		r, err := net.Dial("tcp", p.target)
		if err != nil {
			c.Close() // the relay is down: like a refused connection
			continue
		}
		s := &pass{client: c.(*net.TCPConn), relay: r.(*net.TCPConn)}
		p.mu.Lock()
		p.open++
		p.maxOpen = max(p.maxOpen, p.open)
		p.passes = append(p.passes, s)
		p.mu.Unlock()
		p.all.Go(func() { // ends when both directions have ended
			var both sync.WaitGroup
			both.Go(func() { p.toRelay(s) })
			both.Go(func() { p.toClient(s) })
			both.Wait()
			s.client.Close()
			s.relay.Close()
		})
	}
}

// toRelay runs until the client has closed its side, or the cut.
func (p *proxy) toRelay(s *pass) {
	buf := make([]byte, 16<<10)
	sent := 0
	for {
		n, err := s.client.Read(buf)
		if n > 0 {
			s.mu.Lock()
			s.fromUs = append(s.fromUs, buf[:n]...)
			all := s.fromUs
			s.mu.Unlock()
			if c, at := p.cutAt(all); c != nil {
				s.break_(c, all[sent:at])
				return
			}
			sent = len(all)
			if _, err := s.relay.Write(buf[:n]); err != nil {
				s.client.CloseRead()
				return
			}
		}
		if err != nil {
			s.relay.CloseWrite()
			return
		}
	}
}

// cutAt reports whether and where the cut falls into what a client has sent so far, and takes it.
func (p *proxy) cutAt(said []byte) (*cut, int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cut == nil {
		return nil, 0
	}
	i := bytes.Index(said, p.cut.marker)
	if i < 0 {
		return nil, 0
	}
	at := i + len(p.cut.marker)/2
	if p.cut.behind {
		at = i + len(p.cut.marker)
		if !bytes.Contains(said, []byte("BDAT ")) {
			at += len(".\r\n")
		}
	}
	if at > len(said) {
		return nil, 0
	}
	c := p.cut
	p.cut = nil
	return c, at
}

// break_ forwards the last bytes to the relay, and breaks the connection on both sides.
func (s *pass) break_(c *cut, last []byte) {
	s.mu.Lock()
	s.muted = true
	s.mu.Unlock()
	s.relay.Write(last)
	if c.reset {
		s.client.SetLinger(0)
		s.relay.SetLinger(0)
		s.client.Close()
		s.relay.Close()
		return
	}
	s.client.Close()
	s.relay.CloseWrite() // toClient keeps reading until the relay has closed its side too
}

// toClient runs until the relay has closed its side.
func (p *proxy) toClient(s *pass) {
	buf := make([]byte, 16<<10)
	for {
		n, err := s.relay.Read(buf)
		if n > 0 {
			if p.delay > 0 {
				time.Sleep(p.delay)
			}
			s.mu.Lock()
			if !s.muted {
				s.answer = append(s.answer, answer{bytes.Clone(buf[:n]), len(s.fromUs)})
				s.client.Write(buf[:n])
			}
			s.mu.Unlock()
		}
		if err != nil {
			// Counted before the client can see the close and dial again.
			p.mu.Lock()
			p.open--
			p.mu.Unlock()
			s.mu.Lock()
			if !s.muted {
				s.client.CloseWrite()
			}
			s.mu.Unlock()
			return
		}
	}
}

// count returns the number of connections, the most at once, and the most transactions on one of them.
func (p *proxy) count() (connections, atOnce, transactions int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.passes {
		s.mu.Lock()
		transactions = max(transactions, bytes.Count(s.fromUs, []byte("MAIL FROM:")))
		s.mu.Unlock()
	}
	return len(p.passes), p.maxOpen, transactions
}

// ranAhead counts how often the client sent line, and reports whether it never waited for the reply to what it had sent before.
func (p *proxy) ranAhead(line string) (times int, always bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	always = true
	for _, s := range p.passes {
		s.mu.Lock()
		if at := bytes.LastIndex(s.fromUs, []byte("\n"+line+"\r\n")) + 1; at > 0 {
			times++
			for _, a := range s.answer {
				always = always && a.behind != at
			}
		}
		s.mu.Unlock()
	}
	return times, always
}

// said counts how often the client has sent line.
func (p *proxy) said(line string) (times int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.passes {
		s.mu.Lock()
		times += bytes.Count(s.fromUs, []byte("\n"+line+"\r\n"))
		s.mu.Unlock()
	}
	return times
}
