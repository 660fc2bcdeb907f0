package smtptest

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
)

// Resolver returns a resolver that resolves every name to the addresses of the relay, in their order, except names in the
// system's hosts file. No packet leaves the process. It does not resolve the port: use that of [Server.Addr].
//
// Use it as the Resolver of a net.Dialer whose DialContext is [smtprelay.Config].Dial, or as net.DefaultResolver while a test
// runs. It is safe for concurrent use. Resolver panics before Start.
func (s *Server) Resolver() *net.Resolver {
	s.Addr()
	return &net.Resolver{
		PreferGo: true,
		Dial: func(context.Context, string, string) (net.Conn, error) {
			client, server := net.Pipe()
			go s.answerNames(server) // ends when the resolver closes its end
			return client, nil
		},
	}
}

// answerNames answers DNS queries (RFC 1035, 4), each preceded by its length, as over TCP.
func (s *Server) answerNames(c net.Conn) {
	defer c.Close()
	for {
		var head [2]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return
		}
		question := make([]byte, binary.BigEndian.Uint16(head[:]))
		if _, err := io.ReadFull(c, question); err != nil {
			return
		}
		answer := s.answerName(question)
		if answer == nil {
			return
		}
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
			return
		}
	}
}

// answerName returns the answer to question, or nil if it is not a DNS query.
func (s *Server) answerName(question []byte) []byte {
	const (
		header   = 12
		typeA    = 1
		classIN  = 1
		typeAAAA = 28
		flags    = 0x8180 // a response, recursion desired and available, no error
		name     = 0xC000 | header
	)
	end := header
	for end < len(question) && question[end] != 0 {
		end += 1 + int(question[end])
	}
	end += 1 + 4 // the root, type and class
	if end > len(question) {
		return nil
	}
	kind := binary.BigEndian.Uint16(question[end-4:])

	answer := append([]byte(nil), question[:end]...)
	records := uint16(0)
	for _, addr := range s.addrs {
		ip := netip.MustParseAddrPort(addr).Addr()
		if kind != typeA && kind != typeAAAA || ip.Is4() != (kind == typeA) {
			continue
		}
		data := ip.AsSlice()
		answer = binary.BigEndian.AppendUint16(answer, name)
		answer = binary.BigEndian.AppendUint16(answer, kind)
		answer = binary.BigEndian.AppendUint16(answer, classIN)
		answer = binary.BigEndian.AppendUint32(answer, 0) // TTL
		answer = binary.BigEndian.AppendUint16(answer, uint16(len(data)))
		answer = append(answer, data...)
		records++
	}
	binary.BigEndian.PutUint16(answer[2:], flags)
	binary.BigEndian.PutUint16(answer[6:], records)
	binary.BigEndian.PutUint32(answer[8:], 0) // authorities and additional records
	return answer
}
