package callsites

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/smtprelay/smtprelay"
)

// reset mails a link to whoever has forgotten a password, and tells the browser what became of the mail.
type reset struct{ mail *smtprelay.Client }

func (h *reset) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	to := r.FormValue("email")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), 20*time.Second) // a closed tab does not end the mail
	defer cancel()
	_, err := h.mail.Send(ctx, smtprelay.Message{
		From: "shop@example.com", To: []string{to}, Body: smtprelay.Bytes(message(to)),
	})
	switch e, _ := errors.AsType[*smtprelay.Error](err); {
	case err == nil:
		w.WriteHeader(http.StatusOK)
	case e.Outcome == smtprelay.Unknown:
		w.WriteHeader(http.StatusAccepted) // the mail may come
	case smtprelay.ShouldRetry(err):
		w.WriteHeader(http.StatusServiceUnavailable)
	case e.Scope == smtprelay.ScopeRecipient, e.Op == smtprelay.OpCheck:
		w.WriteHeader(http.StatusUnprocessableEntity) // no such mailbox, or no address at all
	default:
		w.WriteHeader(http.StatusInternalServerError)
	}
}
